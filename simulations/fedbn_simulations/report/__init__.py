"""Tables in the terminal, the HTML report and plots."""
