"""A sweep that outgrows one process: cells, a shared folder where workers meet, and launchers that start them."""
