"""The picture and the report of a run: loss.png and report.html."""
