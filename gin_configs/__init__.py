"""The gin files that come with recexplore: models/, data/ and runs/."""
