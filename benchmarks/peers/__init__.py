"""Other simulators on the same workloads, each as the process of a `benchmarks.rounds.RoundProcess`."""
