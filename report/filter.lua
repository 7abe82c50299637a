-- Turns the report's Markdown into a document: numbered figures and tables, references to them, folded code, tables
-- from HTML, notices. Anything that would be lost without a trace (raw HTML, raw TeX, a reference to nowhere) stops the
-- build; a reference to what some cell declares and did not make on this device says that it is not there.

local kinds = {fig = "Figure", tbl = "Table"}
local absent = {fig = "a figure that is not there", tbl = "a table that is not there"}
local counts, numbers, declared = {fig = 0, tbl = 0}, {}, {}
local html = FORMAT:match("html") ~= nil

local function number(id, caption)
  local kind = id:match("^(%l+)-")
  if not kinds[kind] then error("a figure or table needs a label that starts with fig- or tbl-, not '" .. id .. "'") end
  if numbers[id] then error("label used twice: " .. id) end
  if #caption.long == 0 then error("no caption: " .. id) end
  counts[kind] = counts[kind] + 1
  numbers[id] = kinds[kind] .. " " .. counts[kind]
  if html then -- typst numbers by itself, in the same order
    local first = caption.long[1]
    caption.long[1] = pandoc.Plain({pandoc.Strong(numbers[id] .. ". ")} .. first.content)
  end
  return caption
end

local function each_cell(tbl, what)
  local sections = {tbl.head.rows}
  for _, body in ipairs(tbl.bodies) do table.insert(sections, body.body) end
  for _, rows in ipairs(sections) do
    for _, row in ipairs(rows) do
      for _, cell in ipairs(row.cells) do what(cell) end
    end
  end
end

local function boxed(tbl) -- in HTML a wide table scrolls in a box, outside of which its caption stands
  if not html then return tbl end
  each_cell(tbl, function(cell) -- of words, which may have several lines
    if utf8.len(pandoc.utils.stringify(cell.contents)) > 24 then cell.classes:insert("long") end
  end)
  local heads, rows, words = {}, 0, false -- few rows with words behind the first column: stacked on a phone
  for _, row in ipairs(tbl.head.rows) do
    for at, cell in ipairs(row.cells) do heads[at] = pandoc.utils.stringify(cell.contents) end
  end
  for _, body in ipairs(tbl.bodies) do
    for _, row in ipairs(body.body) do
      rows = rows + 1
      for at, cell in ipairs(row.cells) do
        words = words or at > 1 and cell.classes:includes("long")
        if heads[at] and at > 1 then cell.attributes["label"] = heads[at] end
      end
    end
  end
  local caption, attr = tbl.caption, pandoc.Attr(tbl.identifier, words and rows <= 12 and {"table", "words"} or {"table"})
  tbl.caption, tbl.attr = {long = {}}, pandoc.Attr()
  return pandoc.Figure({pandoc.Div({tbl}, pandoc.Attr("", {"wide"}))}, caption, attr)
end

local LETTERS, MOST_LETTERS, LINE = 36, 64, 105 -- of a cell that is words, of one in a line, of a line

-- the letters of each column's longest cell; where words make a line longer than the page, those of one that is not; and
-- which columns hold words
local function widths_of(tbl)
  local widths, worded, words = {}, {}, false
  local sections = {tbl.head.rows, table.unpack(tbl.bodies:map(function(body) return body.body end))}
  for _, rows in ipairs(sections) do
    for _, row in ipairs(rows) do
      for at, cell in ipairs(row.cells) do
        local text = pandoc.utils.stringify(cell.contents)
        widths[at] = math.max(widths[at] or 6, utf8.len(text) + 2)
        worded[at] = worded[at] or rows ~= tbl.head.rows and text:match("%a%a%a") ~= nil
        words = words or at > 1 and utf8.len(text) > LETTERS and not text:match("%S" .. ("%S"):rep(30))
      end
    end
  end
  local line, least = 0, 0
  for _, letters in ipairs(widths) do
    line, least = line + letters, least + math.min(letters, MOST_LETTERS)
  end
  return widths, words and line > LINE and least or nil, worded
end

local function table_of(div)
  local caption, raw = div.content[1], div.content[2]
  local doc = pandoc.read(raw.text:gsub("<style.-</style>", ""), "html+tex_math_dollars")
  local tbl
  doc:walk({Table = function(t) tbl = t end})
  if not tbl then error("no table in " .. div.identifier) end
  tbl.attr = pandoc.Attr(div.identifier)
  tbl.caption = number(div.identifier, {long = pandoc.Blocks({pandoc.Plain(caption.content)})})
  each_cell(tbl, function(cell) cell.attr, cell.alignment = pandoc.Attr(), pandoc.AlignDefault end)
  local widths, whole, worded = widths_of(tbl)
  for i = 1, #tbl.colspecs do
    local left = i == 1 or widths[i] > LETTERS or whole and worded[i]
    local share = whole and not html and math.min(widths[i], MOST_LETTERS) / whole or nil
    tbl.colspecs[i] = {left and pandoc.AlignLeft or pandoc.AlignRight, share}
  end
  return boxed(tbl)
end

local before = {
  Meta = function(meta)
    for _, id in ipairs(meta.declared or {}) do declared[pandoc.utils.stringify(id)] = true end
  end,
}

-- code that a reader may unfold: of neighbours one listing, and none in a summary, the unnumbered chapter that leads
local folding = {
  Pandoc = function(doc)
    local out, chapters, summary = pandoc.Blocks({}), 0, false
    for _, block in ipairs(doc.blocks) do
      if block.t == "Header" and block.level == 1 then
        chapters = chapters + 1
        summary = chapters == 1 and block.classes:includes("unnumbered")
        -- in print the contents follow the summary, which begins on the first page
        if chapters == 1 then doc.meta.front = summary or nil end
        if chapters == 2 and doc.meta.front and not html then out:insert(pandoc.RawBlock("typst", "#contents")) end
      end
      local last, folded = out[#out], block.t == "Div" and block.classes:includes("folded")
      if folded and last and last.t == "Div" and last.classes:includes("folded") then
        last.content[1].text = last.content[1].text .. "\n\n" .. block.content[1].text
        out[#out] = last
      elseif not (folded and summary) then
        out:insert(block)
      end
    end
    doc.blocks = out
    return doc
  end,
}

local first_pass = {
  traverse = "topdown",
  Div = function(div)
    if div.classes:includes("table") then return table_of(div), false end
    if div.classes:includes("calculator") and html then -- what stands in it is for print, and for readers without script
      local scripts = '<script src="laws.js"></script><script src="calculator.js"></script>'
      return {div, pandoc.RawBlock("html", scripts)}, false
    end
    if div.classes:includes("folded") then
      if not html then return {}, false end
      return {pandoc.RawBlock("html", "<details><summary>code</summary>"), div.content[1],
              pandoc.RawBlock("html", "</details>")}, false
    end
  end,
  Table = function(tbl) -- of Markdown: numbered like all others, as typst does
    tbl.caption = number("tbl-of-markdown-" .. counts.tbl + 1, tbl.caption)
    return boxed(tbl), false
  end,
  Figure = function(figure)
    local image
    figure:walk({Image = function(i) image = i end})
    figure.caption = number(figure.identifier, figure.caption)
    if html then figure.content = {pandoc.Div(figure.content, pandoc.Attr("", {"wide"}))} end
    return figure, false
  end,
  RawBlock = function(raw) if raw.text == "#contents" then return nil end error("raw " .. raw.format .. " would be lost: " .. raw.text:sub(1, 60)) end,
  RawInline = function(raw) error("raw " .. raw.format .. " would be lost: " .. raw.text:sub(1, 60)) end,
}

local second_pass = {
  Cite = function(cite)
    local id = cite.citations[1].id
    if numbers[id] then return pandoc.Link(numbers[id], "#" .. id) end
    local words = declared[id] and absent[id:match("^(%l+)-")]
    if not words then error("reference to nowhere: @" .. id) end
    return pandoc.Inlines(words)
  end,
  Inlines = function(inlines) -- "N = 16,384" stays on one line
    for at = 2, #inlines - 1 do
      if inlines[at].text == "=" and inlines[at - 1].t == "Space" and inlines[at + 1].t == "Space" then
        inlines[at - 1], inlines[at + 1] = pandoc.Str("\u{a0}"), pandoc.Str("\u{a0}")
      end
    end
    return inlines
  end,
}

-- a report in PDF: what stays with what, where figures go, and how listings break
local WIDEST, FEW, MANY = 112, 12, 40 -- letters of a listing's line; rows of a table that stays whole, and of a long one
local SHORT, BRIEF, EARLY = 90, 160, 2500 -- letters: of a paragraph and a listing that lead on, of a chapter's first page

local function wrapped(text) -- long lines are broken between words, after a comma if one is near
  local lines = {}
  for line in (text .. "\n"):gmatch("(.-)\n") do
    local indent = line:match("^%s*") .. "    "
    while utf8.len(line) > WIDEST and #indent < WIDEST / 2 do
      local head = line:sub(1, WIDEST)
      local at = head:match("^.*, ()", WIDEST * 2 // 3) or head:match("^.*%S ()")
      if not at or at <= #indent then break end
      table.insert(lines, (line:sub(1, at - 2)))
      line = indent .. line:sub(at)
    end
    table.insert(lines, line)
  end
  return table.concat(lines, "\n")
end

local function within(name, block) -- a function of template.typst
  return pandoc.Blocks({pandoc.RawBlock("typst", "#" .. name .. "["), block, pandoc.RawBlock("typst", "]")})
end

local function rows_of(block)
  local rows = 0
  for _, body in ipairs(block.bodies or {}) do rows = rows + #body.body end
  return rows
end

local function placed(block, led, early) -- what a lead-in must not lose stays where it is, else it may float
  local float = early and "sinking" or "floating" -- above a chapter's title there would be no place for it
  if block.t == "Figure" then return led and {block} or within(float, block) end
  local rows = rows_of(block)
  if rows > MANY or rows > FEW and led then return within("long", block) end
  return rows > FEW and within(float, block) or {block}
end

local function is_formula(block)
  return block.t == "Para" and #block.content == 1 and block.content[1].mathtype == "DisplayMath"
end

local third_pass = { -- what template.typst calls by the same names, and style.css in HTML
  Str = function(str) -- in tables and notices pandoc leaves apostrophes as they are
    str.text = str.text:gsub("(%w)'(%w)", "%1’%2")
    return str
  end,
  CodeBlock = function(code)
    if not html then code.text = wrapped(code.text) end
    return code
  end,
  Para = function(para) -- a formula at the end of a paragraph is a block of its own, which a lead-in can stay with
    local last = para.content[#para.content]
    if html or #para.content < 2 or last.mathtype ~= "DisplayMath" then return nil end
    para.content:remove()
    return {para, pandoc.Para({last})}
  end,
  Math = function(math) -- a wide formula scrolls in a box of its own
    if html and math.mathtype == "DisplayMath" then return pandoc.Span({math}, pandoc.Attr("", {"wide", "formula"})) end
  end,
  Div = function(div)
    for _, look in ipairs({"broken", "notice"}) do
      if not html and div.classes:includes(look) then
        div.content:insert(1, pandoc.RawBlock("typst", "#" .. look .. "["))
        div.content:insert(pandoc.RawBlock("typst", "]"))
        return div.content
      end
    end
    local code = div.classes:includes("printed") and div.content[1]
    if code and code.t == "CodeBlock" and code.text:match("^def ") then -- a listing that a cell printed
      code.classes:insert("python")
      return {code}
    end
    if not html and code then return div.content end
  end,
}

local appendix = { -- its sections belong to chapters that have numbers of their own
  Pandoc = function(doc)
    local inside = false
    for _, block in ipairs(doc.blocks) do
      if block.t == "Header" then
        inside = inside or block.identifier:match("^appendix") ~= nil
        if inside then block.classes:insert("unnumbered") end
      end
    end
    return doc
  end,
}

local placing = {
  Pandoc = function(doc)
    if html then return nil end
    local out, led, letters = pandoc.Blocks({}), false, 0 -- letters: of the chapter so far
    for at, block in ipairs(doc.blocks) do
      local after, said = doc.blocks[at + 1] or {}, block.t == "Para" and pandoc.utils.stringify(block) or ""
      local shown = after.t == "Figure" or after.t == "Table" or after.t == "CodeBlock"
      local brief = led and block.t == "CodeBlock" and #block.text < BRIEF and shown
      if block.t == "Header" and block.level == 1 then letters = 0 end
      if block.t == "Figure" or block.t == "Table" then
        out:extend(placed(block, led, letters < EARLY))
      elseif brief or said ~= "" and not is_formula(block) and (is_formula(after) and #said < SHORT
        or shown and (said:match(":%s*$") or #said < SHORT)
        or said:match(":%s*$") and (is_formula(after) or after.t == "BulletList" or after.t == "OrderedList")) then
        out:extend(within("lead", block))
      else
        out:insert(block)
      end
      led = block.t == "Para" and said:match(":%s*$") ~= nil or brief
      letters = letters + #pandoc.utils.stringify(block) + 80 * rows_of(block) + #(block.text or "")
    end
    doc.blocks = out
    return doc
  end,
}

return {before, folding, first_pass, second_pass, third_pass, appendix, placing}
