"""Faults while a small real project runs: what the user sees, and what one more run leaves on disk.

Every case breaks one thing (a kill, a full disk, a damaged file, ...) in a copy of
the project, and compares the result with an undisturbed run. `make faults` plays all
cases and prints a table; the test suite plays a fixed part of them (test_faults.py).
"""
