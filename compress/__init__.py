"""The mathematics of compression, and the one driver that joins the rooms."""
