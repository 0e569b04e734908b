"""The training data: where text comes from, how it is cut into blocks, and in which order they are read.

* text.py       DataArguments, load_text, LOADERS: training and held-out documents, the files that they come from
* tokenizer.py  load_tokenizer, tokenizer_fingerprint: a tokenizer that is named, or trained on the text
* packing.py    pack, pack_both, PackedText: documents -> blocks of one length
* order.py      BlockStream, stream_blocks, spread_blocks, collate_blocks: the order of the blocks; fingerprint: their ids
"""
