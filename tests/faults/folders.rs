//! Folders of language models that other people wrote.
