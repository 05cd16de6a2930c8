"""The training stages, one package each; no stage imports another stage."""
