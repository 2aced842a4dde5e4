"""Data sets → tokens, in this order.

sources, files      names → rows, each with its place; rows: what is wrong with which row
schemas, readers,   the columns of a row → turns, answers, scores (message_trees: OpenAssistant's)
turns
loading             data sets → items of one Kind
chat_template,      items → tokens that fit
fitting
tables, cache       rows with their tokens as Arrow tables, those of large data sets in files
splits              training and held-out rows, shares and weights
demonstrations,     the kinds that the steps load: of step 1, 2, 3 and --ptx_data
comparisons,
prompts, texts
batches             which rows form which batch
"""
