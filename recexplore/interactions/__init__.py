"""Any log → one schema."""
