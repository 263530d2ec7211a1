"""Training examples: read from a file, brought to one of five kinds, turned into tokens.

A row of a file has one of these forms; keys beyond them (an id, a category) are ignored, and where
several forms fit, the first one counts:

====================================  ==========================================================
``messages``                          a list of turns, of which the assistant's are learned
``conversations``                     the same, as ShareGPT calls it
``prompt``, ``completion``            two lists of turns (TRL): the assistant's turns of the
                                      completion are learned; or two texts: the completion is
``prompt``, ``response``              the same
``instruction``, (``input``,)         prompt = instruction, a blank line and the input if there is
``output`` or ``response``            one, and a line end
``question``, ``answer``              prompt = the question and a line end
``query``, ``response``               the same
``problem``, ``solution``             the same
``text``                              every token is learned; of a text classifier, the ``label``
                                      beside it
``image``, ``label``                  an image of a class folder, and its class
``sentence``, ``label``               a sentence and its class, by name or number
``sentence1``, ``sentence2``,         a pair and its class
``label``
====================================  ==========================================================

A turn is ``{"role", "content"}`` with a role of system, user, assistant or tool, or ShareGPT's
``{"from", "value"}``, where user and assistant may be called human and gpt. Its content is text, or
a list of ``{"type": "text", "text"}``. An assistant's turn of ``weight`` 0, or with ``train`` or
``loss`` false, is not learned; its ``reasoning_content`` or ``thinking`` goes to the template. A
``system`` column beside the turns is their first. A warning names columns that other tools show to
the model and that are not read here, such as ``tools``, ``history`` or ``context``.
"""
