"""What models learn: a loss, and what is counted to judge them."""
