"""An HTTP service over the bank of users, and the page that shows it at work. Needs the extra ``demo``."""
