"""The parts of benchmarks/gpu_first_look.py: what is looked at first on a new card, a process each. No Ray."""
