"""The tests; `helpers` holds the models and files that they share with the benchmarks."""
