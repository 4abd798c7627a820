"""Fault injection and crash recovery: runs that are killed, and disks that fail."""
