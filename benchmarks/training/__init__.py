"""A training step of stage 1 taken apart into phases; see `benchmarks.profile_training`."""
