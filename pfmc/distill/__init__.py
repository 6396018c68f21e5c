"""Running a model in torch, at any stage: simulation, calibration data, generation, comparison."""
