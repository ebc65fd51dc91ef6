-- Text of the tokens that occur, so that a trace can be read without its tokenizer.

CREATE TABLE KV_TOKEN_TEXT(
  token INTEGER NOT NULL PRIMARY KEY,
  text TEXT NOT NULL              -- bytes of the token; a part of a UTF-8 letter where the vocabulary splits letters
);
