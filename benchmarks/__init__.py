"""Benchmarks: conversions beside `cp -r` of the same bytes, planning of large models, and start-up.

Run with ``python -m benchmarks`` (or ``make bench``); README.md says how to read the figures. Nothing here is a test: figures
depend on the machine, and no test looks at them.
"""
