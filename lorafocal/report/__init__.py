"""Pages and pictures: what a run did, and what a config's data hold."""
