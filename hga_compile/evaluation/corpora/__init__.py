"""Texts to evaluate on: named ones that are fetched with their licences, and users' own files."""

from hga_compile.evaluation.corpora.document import Document, TextError, read_files
from hga_compile.evaluation.corpora.named import cache_folder, load, names, shelf
from hga_compile.evaluation.corpora.sources import CorpusError

__all__ = ["CorpusError", "Document", "TextError", "cache_folder", "load", "names", "read_files", "shelf"]
