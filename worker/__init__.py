"""The process that makes pictures: takes jobs from the broker, denoises many in one batch, stores the results."""
