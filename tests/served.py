"""What vLLM makes of model folders, in a process of its own: `python served.py JOB`, a JSON file, answers to a JSON file.

A job names folders, prompts (lists of token ids, all in one batch), how many tokens follow, and options of vLLM's LLM.
The answer has, for every folder, the class that ran, the log-probabilities of each prompt's tokens but the first, and
the tokens that follow; or the words of the exception. Nothing of Microtome is imported here: the plug-in has to be
found by its entry point, and a folder's own code by `trust_remote_code`.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any


def served(folder: str, prompts: list[list[int]], more: int, options: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(folder, enforce_eager=True, skip_tokenizer_init=True, max_model_len=32, max_num_seqs=4, **options)
    alone = options.get("tensor_parallel_size", 1) == 1
    made = llm.apply_model(lambda model: type(model).__name__)[0] if alone else None
    asked = SamplingParams(temperature=0, max_tokens=more, prompt_logprobs=1, detokenize=False, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": one} for one in prompts], asked, use_tqdm=False)
    scores = [
        [seen[token].logprob for token, seen in zip(one[1:], answer.prompt_logprobs[1:], strict=True)]
        for one, answer in zip(prompts, answers, strict=True)
    ]
    return {"class": made, "logprobs": scores, "tokens": [list(answer.outputs[0].token_ids) for answer in answers]}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm.distributed import cleanup_dist_env_and_memory

    found: dict[str, Any] = {}
    for folder in job["folders"]:
        try:
            found[folder] = served(folder, job["prompts"], job["more"], job["options"])
        except Exception as error:
            found[folder] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        cleanup_dist_env_and_memory()
        Path(job["answer"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
