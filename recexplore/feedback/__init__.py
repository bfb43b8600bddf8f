"""A log and its clusters → how users moved into novel interests, and how they liked it."""
