"""A run drawn and written up: loss.png and report.html."""
