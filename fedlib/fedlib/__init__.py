"""fedlib: federated learning on Flower's Message API, in a package that one reads in an hour."""
