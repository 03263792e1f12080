"""What is wrong or odd with a data set, and with its files."""
