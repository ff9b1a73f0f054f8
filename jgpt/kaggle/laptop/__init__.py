"""What runs on the user's own machine: build a kernel, push it to Kaggle, watch it, and download what it wrote."""
