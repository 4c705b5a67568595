"""The wire of the other algorithms: more messages for the table of ``fedlib.messages``.

Message types are actions of Flower's three (``train.proximal``, say), so a node that does not know
an algorithm answers with an error instead of doing something else.
"""
