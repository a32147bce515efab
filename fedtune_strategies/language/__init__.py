"""Language models and the data that tunes them: reading, tokenising, the loss, evaluation.

Data flows one way: a file → `data.read_rows` → rows → `chat.render` → texts → `examples.tokenise` → examples →
`examples.batches` → tensors → `loss.response_loss`. `model` loads and saves models, `evaluation` measures them, and
`partition` cuts one local file into several for demos and experiments.
"""
