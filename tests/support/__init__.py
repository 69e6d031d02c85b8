"""What tests share: servers, clusters and stores of their own, small trainings, sample sets and sources."""
