"Broken files: any content, damaged at random; content whose checksums are right but which says something odd; and files that are traps."
import gzip
import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from random import Random

import numpy as np

HEADERS = (b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"\x93NUMPY\x01\x00", b"PAR1", b"\x80\x02}q\x00.",
           b"BM", b"{", b"II*\x00", b"RIFF\x10\x00\x00\x00WEBP", b"\x1f\x8b\x08\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"P6\n",
           b"%!PS-Adobe", b"")
NUMBERS = (b"1e999", b"-1", b"9"*400, b"nan", b"-inf", b"0x10", b"1_000", "１２".encode(), b"1e-400", b"", b"0",
           b"2147483648", b"18446744073709551616")
TEXTS = (b"../../evil", b"/etc/passwd", b"\x00", b"\xff\xfe", b'"', b"\t", b"\r", b"\n", b",",
         b"\xf0\x9f\x98\x80", b"\xed\xa0\x80", b"=cmd()", b"{}", b"\x1b[31m")


# ---- at random

def span(content, draw, most=64):
    start = draw.randrange(len(content) + 1)
    return start, min(len(content), start + draw.randrange(1, most))


def bit(content, draw):
    if not content: return content
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1:]


def put(content, draw, inside):
    "Write over a random place."
    start = draw.randrange(len(content) + 1)
    return content[:start] + inside + content[start + len(inside):]


def insert(content, draw, inside):
    start = draw.randrange(len(content) + 1)
    return content[:start] + inside + content[start:]


def doubled(content, draw):
    start, stop = span(content, draw, max(2, len(content)//2))
    return content[:stop] + content[start:stop]*draw.choice((1, 1, 2, 40)) + content[stop:]


def removed(content, draw):
    start, stop = span(content, draw, max(2, len(content)//2))
    return content[:start] + content[stop:]


def zero_run(content, draw):
    start, stop = span(content, draw, max(2, len(content)))
    return content[:start] + bytes(stop - start) + content[stop:]


def length_field(content, draw):
    "A number of two to eight bytes, near the beginning or the end where headers are, that is far too large."
    size, order = draw.choice((2, 4, 8)), draw.choice(("little", "big"))
    value = draw.choice((2**(8*size) - 1, 2**(8*size - 1) - 1, 2**(8*size - 1), 2**(8*size - 4)))
    start = draw.choice((draw.randrange(64), max(0, len(content) - 1 - draw.randrange(64)), draw.randrange(len(content) + 1)))
    return content[:start] + value.to_bytes(size, order) + content[start + size:]


def other_number(content, draw):
    found = list(re.finditer(rb"-?\d+(?:\.\d+)?", content))
    if not found: return insert(content, draw, draw.choice(NUMBERS))
    match = draw.choice(found)
    return content[:match.start()] + draw.choice(NUMBERS) + content[match.end():]


def swapped_lines(content, draw):
    lines = content.splitlines(keepends=True)
    if len(lines) < 2: return content[::-1]
    a, b = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return b"".join(lines)


def nested(content, draw):
    "The content in an archive of another kind."
    kind, file = draw.randrange(3), io.BytesIO()
    if kind == 0: return gzip.compress(content)
    if kind == 1:
        with zipfile.ZipFile(file, "w") as archive: archive.writestr("inside", content)
    else:
        with tarfile.open(fileobj=file, mode="w") as archive:
            member = tarfile.TarInfo("inside")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def encoded(content, draw):
    text = content.decode("latin-1")
    return draw.choice((lambda: text.encode("utf-16"), lambda: text.encode("utf-32-be"), lambda: text.encode("utf-8"),
                        lambda: b"\xef\xbb\xbf" + content, lambda: content.replace(b"\n", b"\r"), lambda: content.replace(b"\n", b"")))()


CHANGES = {
    "bit": bit, "bits": lambda c, d: bit(bit(bit(c, d), d), d), "cut": lambda c, d: c[:d.randrange(len(c) + 1)],
    "head lost": lambda c, d: c[d.randrange(len(c) + 1):], "zeros": zero_run, "doubled": doubled, "removed": removed,
    "random bytes": lambda c, d: put(c, d, d.randbytes(d.randrange(1, 40))), "noise": lambda c, d: d.randbytes(d.randrange(600)),
    "header": lambda c, d: d.choice(HEADERS) + c[d.choice((0, 2, 4, 8)):], "length": length_field, "number": other_number,
    "text": lambda c, d: insert(c, d, d.choice(TEXTS)),
    "long line": lambda c, d: insert(c, d, d.choice((b"a", b"1 ", b"\x00", b"["))*200_000),
    "lines": swapped_lines, "nested": nested, "encoding": encoded, "trailing": lambda c, d: c + d.randbytes(d.randrange(1, 300))}


def mutate(content, draw):
    "One to three random changes."
    for _ in range(draw.choice((1, 1, 2, 3))): content = CHANGES[draw.choice(list(CHANGES))](content, draw)
    return content


# ---- with checksums that are right

ODD = (None, True, -1, 0, 10**30, 1e308, "", "../../evil", "\x00", [], {}, [None], {"a": 1}, [[]], "nan", [1, 2, 3], {"dict": {}},
       {"tensor": "no"},
       {"list": 3}, {"ImageView": {"dict": {}}}, {"a": 1, "b": 2})


def forge_tree(tree, draw):
    "Plain values in which a few are replaced, left out or put in another place."
    places = []
    def walk(node, parent, key):
        if parent is not None: places.append((parent, key))
        for inner, value in list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else ():
            walk(value, node, inner)
    walk(tree, None, None)
    for _ in range(draw.choice((1, 1, 2, 4))):
        if not places: return draw.choice(ODD)
        parent, key = draw.choice(places)
        if isinstance(parent, dict): parent = {} if key not in parent else parent
        elif key >= len(parent): continue
        if not parent: continue
        action = draw.randrange(4)
        if action == 0: del parent[key]
        elif action == 1 and isinstance(parent, dict): parent[draw.choice(("", "x", "__class__", "dict", "tensor"))] = parent.pop(key)
        elif action == 2:
            other, name = draw.choice(places)
            if isinstance(other, dict) and name in other or isinstance(other, list) and name < len(other):
                parent[key] = json.loads(json.dumps(other[name])) # a copy: a tree that holds itself cannot be written
        else: parent[key] = draw.choice(ODD)
    return draw.choice(ODD) if draw.random() < .03 else tree


def forge_json(content, draw): return json.dumps(forge_tree(json.loads(content), draw)).encode()


def forge_zip(content, draw):
    "An archive one of whose members is damaged, renamed, lost or packed otherwise; its checksums are right."
    with zipfile.ZipFile(io.BytesIO(content)) as archive: members = {name: archive.read(name) for name in archive.namelist()}
    name, file, kind = draw.choice(list(members)), io.BytesIO(), draw.randrange(8)
    if kind == 0: del members[name]
    elif kind == 1: members[draw.choice(("../../evil", "/tmp/evil", name + "x", "a"*3000, "ü\x01"))] = members.pop(name)
    else: members[name] = mutate(members[name], draw)
    packing = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name, inside in members.items(): archive.writestr(name, inside)
    return file.getvalue()


def forge_safetensors(content, draw):
    "Another header, whose length is right."
    size = int.from_bytes(content[:8], "little")
    header = forge_json(content[8:8 + size], draw)
    return len(header).to_bytes(8, "little") + header + content[8 + size:]


def forge_png(content, draw):
    "A chunk is damaged, its checksum is right."
    chunks, place = [], 8
    while place < len(content):
        size = int.from_bytes(content[place:place + 4], "big")
        chunks.append([content[place + 4:place + 8], content[place + 8:place + 8 + size]])
        place += 12 + size
    chunk = draw.choice(chunks)
    if chunk[0] == b"IDAT" and draw.random() < .5: chunk[1] = zlib.compress(mutate(zlib.decompress(chunk[1]), draw))
    else: chunk[1] = mutate(chunk[1], draw)
    if draw.random() < .2: chunk[0] = draw.choice((b"IDAT", b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"eXIf", b"acTL", b"IEND"))
    return content[:8] + b"".join(len(c).to_bytes(4, "big") + k + c + zlib.crc32(k + c).to_bytes(4, "big") for k, c in chunks)


def forge_tar(content, draw):
    "A field of a member's header is damaged, its checksum is right."
    block = bytearray(content[:512])
    start, stop = draw.choice(((0, 100), (124, 136), (156, 157), (157, 257), (345, 500)))
    value = draw.choice((b"\xff"*12, b"\x80" + b"\xff"*11, b"../../../evil", b"/etc/passwd", b"77777777777", b"x", b"L", b"S", b"2", b"1",
                         draw.randbytes(8)))
    block[start:stop] = value[:stop - start].ljust(stop - start, b"\0")
    return signed_tar_header(block) + content[512:]


def signed_tar_header(block):
    block[148:156] = b" "*8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


# ---- traps

class Trap:
    "Unpickling this makes a folder."
    def __init__(self, canary): self.canary = str(canary)
    def __reduce__(self): return os.mkdir, (self.canary,)


def pickled(canary): return pickle.dumps({"words": Trap(canary), "method": Trap(canary)})


def packed(members, stored=True):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items(): archive.writestr(name, content)
    return file.getvalue()


def evil_zip(canary):
    return packed({"../../evil": b"x", f"{canary}/evil": b"x", "data.pkl": pickled(canary), "archive/data.pkl": pickled(canary)})


def evil_tar(canary):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, link in (("../../evil", ""), (f"{canary}/evil", ""), ("link", "/etc/passwd"), ("0.png", str(canary))):
            member = tarfile.TarInfo(name)
            member.size, member.linkname, member.type = (0, link, tarfile.SYMTYPE) if link else (4, "", tarfile.REGTYPE)
            archive.addfile(member, io.BytesIO(b"evil"))
    return file.getvalue()


def endless_tar(canary):
    "The size of its header is negative: who skips so far stands before it again."
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"\xff"*10 + (-1024 & 0xffff).to_bytes(2, "big")
    return signed_tar_header(header) + bytes(1024)


def npy(array, pickled=False):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=pickled)
    return file.getvalue()


def huge_npy(shape="(1000000000000,)", kind="<f4"):
    "A header that claims far more numbers than there are."
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def zip_of_zeros(name, head, gigabytes):
    "A small archive of a large member: what follows its head are zeros; the same packed block over and over, with a wrong checksum."
    packer, count = zlib.compressobj(9, wbits=-15), 64*gigabytes
    start, block = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH), packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    content, name = start + block*count + packer.flush(), name.encode()
    fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, len(content), len(head) + count*2**24, len(name), 0)
    before = b"PK\x03\x04" + fields + name + content
    directory = b"PK\x01\x02\x14\x00" + fields + bytes(14) + name
    return before + directory + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(directory), len(before), 0)


def huge_png(width, height):
    "A header that claims so many pixels, and a beginning of them."
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(len(c).to_bytes(4, "big") + k + c + zlib.crc32(k + c).to_bytes(4, "big") for k, c in chunks)


# ---- what is true of every file: any of these can stand where a good one should

def folder(path, canary): path.mkdir()
def pipe(path, canary): os.mkfifo(path)
def loop(path, canary): path.symlink_to(path)
def nowhere(path, canary): path.symlink_to(path.parent/"nowhere"/"at all")
def endless(path, canary): path.symlink_to("/dev/zero")
def whole_folder(path, canary): path.symlink_to(path.parent)


def content(make): return lambda path, canary: path.write_bytes(make(canary))


TRAPS = {"a folder": folder, "a pipe": pipe, "a link to itself": loop, "a link to nothing": nowhere, "a link to /dev/zero": endless,
         "a link to its folder": whole_folder, "empty": content(lambda _: b""), "one byte": content(lambda _: b"\x80"),
         "a pickle": content(pickled), "a zip of other places": content(evil_zip), "a tar of other places": content(evil_tar),
         "one long line": content(lambda _: b"a"*2_000_000), "many separators": content(lambda _: b"\t, "*500_000),
         "deep": content(lambda _: b"["*200_000), "deep and closed": content(lambda _: b'{"a":'*50_000 + b"1" + b"}"*50_000),
         "UTF-16": content(lambda _: "file,age\na,1\n".encode("utf-16")), "a BOM": content(lambda _: b"\xef\xbb\xbf"),
         "a number with a million digits": content(lambda _: b'{"a": ' + b"9"*1_000_000 + b"}"),
         "zeros": content(lambda _: bytes(1_000_000)),
         "zipped zeros": content(lambda _: packed({"a.txt": bytes(50_000_000)}, stored=False))}


def draws(seed): return Random(seed) # the same on every machine: a text is hashed by SHA-512
