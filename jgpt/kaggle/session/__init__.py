"""What runs in a session on Kaggle: find the inputs, restore the run, respect the limits, and save the output."""
