"""The side-by-side study: data and settings, runs, memory, report. `benchmarks/compare.py` is its command."""
