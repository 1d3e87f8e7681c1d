"""HTTP service for personalized predictions of many users, and its demo page. Needs the extra ``demo``."""
