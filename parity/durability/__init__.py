"""Fault injection and crash recovery: what a run loses when it is killed, and when its disk fails."""
