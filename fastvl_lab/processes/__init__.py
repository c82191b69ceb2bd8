"""Servers of other engines as processes of the lab's: started, waited for, and ended with whoever started them."""
