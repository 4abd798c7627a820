"""Fuzzing of every file format that tinyllm reads: a broken file is refused, or what it loads is valid."""
