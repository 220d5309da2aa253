"""Pipeline parallelism: schedules as lists of instructions that can be printed, checked, simulated and run."""
