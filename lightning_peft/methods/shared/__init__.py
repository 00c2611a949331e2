"""What several methods use: initialisations, kernel factors, trainable tokens, batched prefixes, cache checks."""
