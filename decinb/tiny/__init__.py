"""Train and evaluate the bundled models. Nothing else imports this package."""
