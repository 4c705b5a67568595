"""Other algorithms than FedAvg: what the course's labs build, one small module each.

Nothing of the app needs them. Their messages are in ``fedlib.algorithms.messages``.
"""
