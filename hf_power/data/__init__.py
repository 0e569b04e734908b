"""The training data: where text comes from, how it is cut into blocks, and in which order they are read.

* text.py       DataArguments, load_text: training and held-out documents of the standard library, local files or the Hub
* files.py      local_files, opened: which files a name stands for, and their bytes
* readers.py    a reader for each kind of file: lines and texts, or why there is none
* documents.py  read_documents, Counts: the texts of files one after the other; what is bad is named, or skipped and counted
* store.py      stored, streamed: documents of files as a dataset, cached by the files' state; made_once
* split.py      Texts, split_stored, split_stream: held-out documents as a share of the text
* tokenizer.py  load_tokenizer, tokenizer_fingerprint: a tokenizer that is named, or trained on the text
* packing.py    pack, pack_both, PackedText: documents -> blocks of one length
* order.py      BlockStream, stream_blocks, spread_blocks, collate_blocks: the order of the blocks; fingerprint: their ids
"""
