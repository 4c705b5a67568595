"""Instant answers for the exercises of the course: one function each, in the notebooks' order.

A check prints one line: ✅ right, ⏳ nothing was filled in yet, or ❌ with the question that was
put to the answer, what was expected, what came and by how much it is off.
"""

from fedlib.verdict import Answer, check, expect

# --- 00 Start here


# --- 01 Fifty clients, fifty data sets


# --- 02 The model and its local training


# --- 03 Messages and records


# --- 04 The ClientApp


# --- 05 The ServerApp: one round


# --- 06 Aggregation


# --- 07 Query and opt-in


# --- 08 The round loop


# --- 09 Tracking and plots
