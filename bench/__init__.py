"""Benchmarks: what is measured (registry), how (run, memory, profile_step), and whether the results
that were timed are right (verify)."""
