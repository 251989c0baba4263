"""What runs, on which tensors, in what order.

Everything else is derived from here: `components.py` declares the tensors, `pipeline.py` the algorithm. No folder of this
repository is imported, and no deep-learning framework, so every process (server, client tests, exporter) can import it.
"""
