"""The networks that the pruners are compared on, and the script that trains them."""
