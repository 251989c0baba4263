"""`sparrow eval`: asks a server the questions of a benchmark and compares its masks with the annotated ones.

a benchmark on disk ─► samples ─► asking.py: server ─► OUT/predictions/ ─► the benchmark's score ─► OUT, benchmarks/results/ ─► report.py
"""
