import gzip
import struct
import zlib

import pytest

from hga_compile.evaluation.corpora.rdata import RDataError, parse, read_strings

HEADER = b"X\n" + struct.pack(">iii", 2, 0x040201, 0x020300)
NIL = struct.pack(">i", 254)


def integers(*values):
    return struct.pack(f">ii{len(values)}i", 13, len(values), *values)


def char(text, flags=9):
    raw = text.encode()
    return struct.pack(">ii", flags, len(raw)) + raw


def strings(*texts):
    return struct.pack(">ii", 16, len(texts)) + b"".join(map(char, texts))


def named_list(**members):
    names = struct.pack(">i", 0x402) + struct.pack(">i", 1) + char("names") + strings(*members) + NIL
    return struct.pack(">ii", 0x213, len(members)) + b"".join(members.values()) + names


def database(folder, value, variable="emma"):
    record = zlib.compress(HEADER + value)
    record = struct.pack(">I", len(HEADER + value)) + record
    index = named_list(variables=named_list(**{variable: integers(3, len(record))}), references=NIL)
    (folder / "Rdata.rdb").write_bytes(b"pad" + record)
    (folder / "Rdata.rdx").write_bytes(gzip.compress(HEADER + index))
    return folder / "Rdata.rdb"


def test_character_vector_is_read_through_the_index(tmp_path):
    rdb = database(tmp_path, strings("EMMA", "", "By Jane Austen — née"))
    assert read_strings(rdb, "emma") == ["EMMA", "", "By Jane Austen — née"]


def test_version_3_header_and_references():
    header = b"X\n" + struct.pack(">iii", 3, 0x040201, 0x030500) + struct.pack(">i", 5) + b"UTF-8"
    symbol = struct.pack(">i", 1) + char("names")
    again = struct.pack(">i", (1 << 8) | 255)
    assert parse(header + struct.pack(">ii", 19, 2) + symbol + again) == ["names", "names"]


def test_missing_variable_names_what_there_is(tmp_path):
    with pytest.raises(RDataError, match=r"no variable 'persuasion'.*emma"):
        read_strings(database(tmp_path, strings("x")), "persuasion")


def test_numbers_are_not_a_text(tmp_path):
    with pytest.raises(RDataError, match="not a character vector"):
        read_strings(database(tmp_path, integers(1, 2)), "emma")


def test_cut_and_foreign_data_are_refused(tmp_path):
    with pytest.raises(RDataError, match="ends early"):
        parse(HEADER + strings("EMMA")[:-2])
    with pytest.raises(RDataError, match="not XDR"):
        parse(b"A\n" + HEADER)
    with pytest.raises(RDataError, match="type 3"):
        parse(HEADER + struct.pack(">ii", 3, 0))
    rdb = database(tmp_path, strings("EMMA" * 100))
    rdb.write_bytes(rdb.read_bytes()[:-5])
    with pytest.raises(RDataError, match="cut short"):
        read_strings(rdb, "emma")
