"""Measures what users see, through the client, and keeps every figure as a line under results/."""
